--- @include lib/basics/stamps
--- @include lib/failure/push
--- @include lib/rq/waiters

-- To the back of its queue. Under a rate limit of RQ's it needs a slot first: it is registered as RQ's `enqueue` does
-- it, and gets the next free one, from RQ's own code too.
local function to_back(queue, id)
  local limit = redis.call('HMGET', KEY.job .. id, 'rate_limit_key', 'rate_limit_concurrency')
  if limit[1] and limit[2] then
    redis.call('SADD', KEY.limited, limit[1])
    redis.call('HSET', KEY.limit .. limit[1], 'concurrency', limit[2])
    redis.call('ZADD', KEY.limit .. limit[1] .. ':rate_limited', timestamp(), id)
    redis.call('HSET', KEY.job .. id, 'status', 'rate_limited')
    note_waited_for(id)
  else
    push('RPUSH', queue, id)
  end
end
