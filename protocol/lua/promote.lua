-- Move retries and delayed requests that are due to the end of their queues, and end what waits past its deadline.
--
-- ARGV limit         in all queues together, at most 128
-- EACH queue: queue  queue names
--
-- Returns  how many were moved, as text, then '1' if there may be more to do
--
-- Beside that, for a few of each queue: a request that somebody's tool has put back after its end loses the TTL of that
-- end, or it would expire while it waits.
--
-- When the server's clock was set back, retries, delays and deadlines lie too far ahead. They are found a page at a
-- time, until the old clock's time is reached: a retry, or a delay, counts again from now; so does a deadline that was
-- given in seconds. One that was given as a date stays. So nothing is late by more than it was to wait at first.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/pages
--- @include lib/basics/time
--- @include lib/ending/end_if_late
--- @include lib/ending/set_deadlines_back
--- @include lib/ending/watch_deadline
--- @include lib/lease/lease
--- @include lib/queue/aside
--- @include lib/queue/enqueued_again
--- @include lib/queue/forget
--- @include lib/queue/keep_requeued
--- @include lib/queue/promote
--- @include lib/rq/ended

never_refused()

local limit = math.min(tonumber(arg()), 128)
local moved, left = 0, limit

-- Whether the server's clock was set back lately: see pulse().
local function set_back()
  return now_ms < number_of(redis.call('HGET', KEY.pulse, 'back_until'))
end

-- End what waits past its deadline. The id stays in its queue's list; the claim that pops it drops it. Returns how many
-- were looked at, at most `limit`.
local function end_late(queue, limit)
  if limit < 1 then return 0 end
  local due = redis.call('ZRANGEBYSCORE', KEY.deadlines .. queue, '-inf', int(now_ms), 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    redis.call('ZREM', KEY.deadlines .. queue, id)
    local job = redis.call('HMGET', KEY.job .. id, 'status', 'execution')
    if not job[1] then
      forget(id)
    elseif not ENDED[job[1]] and (job[2] or '') == '' and enqueued_again(read_dates(id)) ~= 'new' then
      if not end_if_late(queue, id) then watch_deadline(queue, id) end
    end
  end
  return #due
end

-- Count again from now what a clock that was set back has put too far ahead.
local function set_back_times(queue)
  for _, id in ipairs(some_of(KEY.retries .. queue, 64, 500)) do
    local since = number_of(redis.call('HGET', KEY.job .. id, 'aside_at'))
    if since > now_ms then
      local wait = number_of(redis.call('ZSCORE', KEY.retries .. queue, id)) - since
      redis.call('ZADD', KEY.retries .. queue, int(now_ms + math.max(0, wait)), id)
      redis.call('HSET', KEY.job .. id, 'aside_at', now_text)
    end
  end
  for _, id in ipairs(some_of(KEY.deadlines .. queue, 64, 500)) do
    if set_deadlines_back(id, redis.call('HGET', KEY.job .. id, 'counted_from')) then watch_deadline(queue, id) end
  end
  for _, id in ipairs(some_of(KEY.leases .. queue, 64, 500)) do
    local job = redis.call('HMGET', KEY.job .. id, 'holder', 'task', 'step_ms', 'timeout')
    local lease = number_of(redis.call('HGET', KEY.incarnation .. (job[1] or ''), 'lease'), 30000)
    local length = job[2] and lease_length(job[3], lease) or plain_lease(number_of(job[4], 180))
    if number_of(redis.call('ZSCORE', KEY.leases .. queue, id)) > now_ms + length then
      redis.call('ZADD', KEY.leases .. queue, int(now_ms + length), id)
    end
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEY.suspects .. queue, '(' .. now_text, '+inf', 'LIMIT', 0, 64)) do
    redis.call('ZADD', KEY.suspects .. queue, now_text, id)
  end
end

local back = set_back()
for _ = 1, tonumber(arg()) do
  local queue = arg()
  if back then set_back_times(queue) end
  left = left - end_late(queue, left)
  local looked, here = promote(queue, left)
  left, moved = left - looked, moved + here
  keep_requeued(queue, redis.call('LRANGE', KEY.queue .. queue, 0, 7))
  keep_requeued(queue, redis.call('LRANGE', KEY.queue .. queue, -8, -1))
  settle_aside(queue)
end
return { int(moved), left < 1 and '1' or '0' }
