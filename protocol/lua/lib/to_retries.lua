--- @include lib/numbers
--- @include lib/time
--- @include lib/waiters
--- @include lib/watch_deadline

-- To wait for a due time. In our own set: RQ's scheduler would move it in two steps, and lose it between them.
local function to_retries(queue, id, delay)
  redis.call('HSET', KEY.job .. id, 'status', 'scheduled', 'aside_at', now_text)
  redis.call('ZADD', KEY.retries .. queue, int(now_ms + delay * 1000), id)
  watch_deadline(queue, id)
  note_waited_for(id) -- as in RQ, a slot under a rate limit is for what is queued or runs
end
