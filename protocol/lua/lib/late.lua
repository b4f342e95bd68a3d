--- @include lib/numbers
--- @include lib/time

-- A deadline that was given in seconds counts from `counted_from`. If that lies ahead, the server's clock was set back
-- since, and the deadline goes back by as much. One that was given as a date stays what it is.
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

-- Why a waiting request has missed its time; nil if it has not.
local function late(id)
  set_deadlines_back(id, redis.call('HGET', KEY.job .. id, 'counted_from'))
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  if due[1] and number_of(due[1], now_ms + 1) <= now_ms then return 'its deadline passed while it waited' end
  if due[2] and number_of(due[2], now_ms + 1) <= now_ms then return 'no worker took it within its queue_timeout' end
end
