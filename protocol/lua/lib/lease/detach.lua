-- Take an execution out of its holder's index; a newer one of the same request stays there.
local function unhold(id, execution, incarnation)
  local name = KEY.held .. incarnation
  if redis.call('HGET', name, id) == execution then redis.call('HDEL', name, id) end
end

-- Nobody holds this execution any more: delete its lease, its entry in the holder's index, and RQ's records of it.
local function detach(queue, id, execution, incarnation, worker)
  local composite = id .. ':' .. execution
  redis.call('ZREM', KEY.leases .. queue, id)
  unhold(id, execution, incarnation)
  redis.call('ZREM', KEY.wip .. queue, composite)
  redis.call('DEL', KEY.execution .. composite)
  redis.call('ZREM', KEY.executions .. id, execution)
  redis.call('SREM', KEY.worker .. worker .. ':executions', composite)
end
