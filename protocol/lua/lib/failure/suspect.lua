--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/checkpoint/history
--- @include lib/lease/read_run

-- Make a request a suspect, one of `flight` that were in flight when their worker crashed or hung. From now on at most
-- half as many run with it, so that the next crash leaves half of the suspects. job: of read_run().
local function suspect(id, job, execution, worker, flight, offset, kind)
  local company = math.max(1, math.floor(flight / 2))
  change(job, 'company', int(company))
  history(id, 'suspected', worker, execution, offset, kind, 'one of ' .. int(flight)
    .. ' in flight; it now runs with at most ' .. int(company - 1) .. ' others')
  count('suspected', job.origin or '')
end
