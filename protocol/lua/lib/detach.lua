-- The holder's index forgets this execution; a newer one of the same request stays.
local function unhold(id, execution, incarnation)
  if redis.call('HGET', KEY.held .. incarnation, id) == execution then redis.call('HDEL', KEY.held .. incarnation, id) end
end

-- End a holding: lease, holder's index, and all of RQ's traces of the execution.
local function detach(queue, id, execution, incarnation, worker)
  local composite = id .. ':' .. execution
  redis.call('ZREM', KEY.leases .. queue, id)
  unhold(id, execution, incarnation)
  redis.call('ZREM', KEY.wip .. queue, composite)
  redis.call('DEL', KEY.execution .. composite)
  redis.call('ZREM', KEY.executions .. id, execution)
  redis.call('SREM', KEY.worker .. worker .. ':executions', composite)
end
