-- The registry of RQ's in which an end puts a request.
local ENDED = { finished = KEY.finished, failed = KEY.failed, canceled = KEY.canceled, stopped = KEY.canceled }

-- Whether a request stands in the registry of its end. If it has left it, somebody has requeued it, and it waits again.
local function stands_ended(queue, id, verdict)
  local registry = ENDED[verdict]
  return registry and redis.call('ZSCORE', registry .. queue, id)
end
