--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/ending/watch_deadline
--- @include lib/queue/aside
--- @include lib/rq/waiters

-- Let a request wait so many seconds, in a set of ours: RQ's scheduler moves a job in two steps, and could lose it
-- between them.
local function to_retries(queue, id, delay)
  redis.call('HSET', KEY.job .. id, 'status', 'scheduled', 'aside_at', now_text)
  redis.call('ZADD', KEY.retries .. queue, int(now_ms + delay * 1000), id)
  note_aside(queue, int(now_ms + delay * 1000))
  watch_deadline(queue, id)
  note_waited_for(id) -- as in RQ, only what is queued or runs has a slot under a rate limit
end
