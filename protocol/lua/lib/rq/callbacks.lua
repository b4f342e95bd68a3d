--- @include lib/basics/time
--- @include lib/failure/verdict

-- Note that RQ's webhooks or callbacks are to be called for this end; a worker calls them. One note for each end: what
-- `last` holds, and the id. Returns whether there are any.
local function note_to_tell(id, last)
  local callbacks = { finished = 'success_callback_name', failed = 'failure_callback_name',
    retried = 'failure_callback_name', stopped = 'stopped_callback_name' }
  local field = callbacks[verdict_of(last)]
  if not field then return false end
  -- RQ writes '' where there is no callback.
  local asked = redis.call('HMGET', KEY.job .. id, field, 'webhooks')
  if (asked[1] or '') == '' and (asked[2] or '') == '' then return false end
  redis.call('SADD', KEY.notices, last .. ':' .. id)
  redis.call('EXPIRE', KEY.notices, 7 * DAY)
  return true
end
