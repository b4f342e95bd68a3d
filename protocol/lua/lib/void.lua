--- @include lib/detach
--- @include lib/forget
--- @include lib/served

-- What is left of an execution that is not the current one any more, or never was: all of it goes but the lease, which may
-- be its successor's. RQ's clean-up would take its record for an abandoned job, and fail the one that has the id now.
-- queue: nil if the hash is gone; then there is no successor, and the lease goes too, in whichever of the worker's queues.
local function void(id, execution, incarnation, queue)
  forget(id)
  unhold(id, execution, incarnation)
  local composite = id .. ':' .. execution
  redis.call('ZREM', KEY.executions .. id, execution)
  redis.call('DEL', KEY.execution .. composite)
  if queue then
    redis.call('ZREM', KEY.wip .. queue, composite)
    return
  end
  local looked = 0
  for text in string.gmatch(redis.call('HGET', KEY.incarnation .. incarnation, 'queues') or '', '[^,]+') do
    local name = unlisted(text)
    if looked >= 64 then break end -- in others the sweep finds it, once it has run out
    looked = looked + 1
    for _, one in ipairs(served(name)) do
      redis.call('ZREM', KEY.wip .. one, composite)
      redis.call('ZREM', KEY.leases .. one, id)
    end
  end
end
