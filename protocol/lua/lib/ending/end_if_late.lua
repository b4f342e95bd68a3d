--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/ending/set_deadlines_back
--- @include lib/failure/bury

-- Why a waiting request has missed its time; nil if it has not.
local function late(id)
  set_deadlines_back(id, redis.call('HGET', KEY.job .. id, 'counted_from'))
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  if due[1] and number_of(due[1], now_ms + 1) <= now_ms then return 'its deadline passed while it waited' end
  if due[2] and number_of(due[2], now_ms + 1) <= now_ms then return 'no worker took it within its queue_timeout' end
end

-- End a waiting request if it has missed its time. Returns whether it has.
local function end_if_late(queue, id)
  local reason = late(id)
  if reason then bury(queue, id, '', '', nil, 'DEADLINE', reason, LATE) end
  return reason ~= nil
end
