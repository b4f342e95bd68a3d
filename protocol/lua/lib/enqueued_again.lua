--- @include lib/owns

-- Whether somebody has enqueued this id since its last claim: 'same' for the same job once more (`enqueue_job`),
-- 'new' if RQ's `enqueue` saved another job over it, which has not begun. RQ dates each entry into a queue. A date that
-- the last claim has seen, or that of the submit, was only written back by somebody with an old copy of the job. Dates
-- are compared for being the same, not by time: they come from the clocks of many producers.
local function enqueued_again(job)
  if job.started_at == '' and saved_over(job.entered, job.created_at, job.timeout) then return 'new' end
  local date, seen = job.enqueued_at or '', job.entered and string.match(job.entered, '^(.*) ')
  return date ~= '' and date ~= (seen or job.created_at) and date ~= job.created_at and 'same' or nil
end

-- What enqueued_again() looks at, and the status.
local function read_dates(id)
  local names, job = { 'status', 'started_at', 'enqueued_at', 'created_at', 'entered', 'timeout' }, {}
  for i, value in ipairs(redis.call('HMGET', KEY.job .. id, unpack(names))) do job[names[i]] = value or nil end
  return job
end
