--- @include lib/basics/dates
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/queue/ring

-- A suspect waits in a set of its own until a worker can run it among few others.
local function to_suspects(queue, id)
  redis.call('ZADD', KEY.suspects .. queue, 'NX', int(now_ms), id)
  ring(queue)
end

-- Into the queue: command is RPUSH or LPUSH, for the back or the front of its list.
local function push(command, queue, id)
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'enqueued_at', utc())
  if redis.call('HEXISTS', KEY.job .. id, 'company') == 1 then
    to_suspects(queue, id)
  else
    redis.call(command, KEY.queue .. queue, id)
  end
end
