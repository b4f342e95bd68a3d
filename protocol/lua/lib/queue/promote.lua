--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/ending/is_canceled
--- @include lib/ending/settle_canceled
--- @include lib/queue/forget
--- @include lib/queue/ring
--- @include lib/queue/to_back

-- Move retries and delayed requests that are due to the back of their queue, so that they do not overtake what waits
-- there. Returns how many were looked at, at most `limit`, and how many were moved.
local function promote(queue, limit)
  if limit < 1 then return 0, 0 end
  local due = redis.call('ZRANGEBYSCORE', KEY.retries .. queue, '-inf', int(now_ms), 'LIMIT', 0, limit)
  local moved = 0
  for _, id in ipairs(due) do
    redis.call('ZREM', KEY.retries .. queue, id)
    -- One that was deleted, or canceled (RQ's Job.cancel does not know this set), only leaves it. Any other status is
    -- for display, and may be an old copy: the request moves, and the claim that finds it decides.
    local job = redis.call('HMGET', KEY.job .. id, 'status', 'origin')
    local status = job[1]
    if not status then
      forget(id)
    elseif job[2] ~= queue then
      -- It was deleted, and its id used again in another queue, where it has a place of its own.
    elseif is_canceled(status) then
      settle_canceled(id)
    else
      if status == 'scheduled' then
        to_back(queue, id)
      else
        redis.call('RPUSH', KEY.queue .. queue, id)
      end
      moved = moved + 1
    end
  end
  if moved > 0 then ring(queue) end
  return #due, moved
end
