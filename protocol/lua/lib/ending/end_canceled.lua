--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/ending/close_canceled
--- @include lib/ending/end_waiting
--- @include lib/ending/mark_ended
--- @include lib/rq/registries

-- End a request as canceled, or as stopped if its status says so. execution: '' if it waits; one that held it was
-- detached before. event: what its history says, if not the state that it ends in.
local function end_canceled(queue, id, execution, worker, status, reason, event)
  local state = status == 'stopped' and 'stopped' or 'canceled'
  local aside = leave_registries(queue, id)
  if execution == '' then end_waiting(queue, id, aside) end
  mark_ended(id, execution, state)
  redis.call('HDEL', KEY.job .. id, 'cancel')
  redis.call('ZADD', KEY.canceled .. queue, int(now_s), id)
  close_canceled(queue, id, execution, worker, event or state, reason)
end
