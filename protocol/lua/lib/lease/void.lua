--- @include lib/lease/detach
--- @include lib/pool/served
--- @include lib/queue/forget

-- Delete what is left of an execution that is not the current one, except the lease, which may be its successor's. RQ's
-- clean-up would take its record for an abandoned job, and fail the job that has the id now. queue: of the hash; nil if
-- it is gone: then there is no successor, and the lease is deleted in all of the worker's queues.
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
    if looked >= 64 then break end -- a sweep finds the lease in the others, once it has run out
    looked = looked + 1
    for _, one in ipairs(served(name)) do
      redis.call('ZREM', KEY.wip .. one, composite)
      redis.call('ZREM', KEY.leases .. one, id)
    end
  end
end
