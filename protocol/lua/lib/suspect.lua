--- @include lib/counters
--- @include lib/history
--- @include lib/numbers

-- Make a request suspect, one of `flight` that were in flight when their worker crashed or hung: from now on it shares
-- a worker with so few others that half of them are out of the question with the next crash.
local function suspect(id, execution, worker, flight, offset, kind)
  local name = KEY.job .. id
  local company = math.max(1, math.floor(flight / 2))
  redis.call('HSET', name, 'company', int(company))
  history(id, 'suspected', worker, execution, offset, kind, 'one of ' .. int(flight) .. ' in flight; it now runs with at most '
    .. int(company - 1) .. ' others')
  count('suspected', redis.call('HGET', name, 'origin') or '')
end
