--- @include lib/dates
--- @include lib/numbers
--- @include lib/ring
--- @include lib/stamps
--- @include lib/time
--- @include lib/waiters
--- @include lib/watch_deadline

-- A suspect waits in a set of its own until a worker can give it limited company.
local function to_suspects(queue, id)
  redis.call('ZADD', KEY.suspects .. queue, 'NX', int(now_ms), id)
  ring(queue)
end

-- command: RPUSH or LPUSH, for the end or the front of the queue's list.
local function push(command, queue, id)
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'enqueued_at', utc())
  if redis.call('HEXISTS', KEY.job .. id, 'company') == 1 then
    to_suspects(queue, id)
  else
    redis.call(command, KEY.queue .. queue, id)
  end
end

-- Back to the queue at once. At the front: it has waited its turn already.
local function to_front(queue, id)
  push('LPUSH', queue, id)
  watch_deadline(queue, id)
  ring(queue)
end

-- To the back of its queue; under a rate limit of RQ's, it first has to get a slot again. Registered as RQ's
-- `enqueue` does, so that RQ's own code too gives it the next one that is free.
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
