--- @include lib/basics/numbers
--- @include lib/basics/time

-- If the server's clock was set back, move deadlines back by as much: those that were given in seconds, which count
-- from `counted_from`. One that was given as a date stays. Returns whether the clock was set back.
local function set_deadlines_back(id, counted_from)
  local ahead = number_of(counted_from) - now_ms
  if ahead <= 0 then return false end
  local name = KEY.job .. id
  local due = redis.call('HMGET', name, 'deadline', 'queue_deadline', 'dated')
  if due[1] and not due[3] then redis.call('HSET', name, 'deadline', int(number_of(due[1]) - ahead)) end
  if due[2] then redis.call('HSET', name, 'queue_deadline', int(number_of(due[2]) - ahead)) end
  redis.call('HSET', name, 'counted_from', now_text)
  return true
end
