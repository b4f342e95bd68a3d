--- @include lib/basics/dates
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/queue/aside
--- @include lib/queue/ring

-- A suspect waits in a set of its own until a worker can run it among few others.
local function to_suspects(queue, id)
  redis.call('ZADD', KEY.suspects .. queue, 'NX', int(now_ms), id)
  note_aside(queue, int(now_ms))
  ring(queue)
end

-- Where it waits: command is RPUSH or LPUSH, for the back or the front of the queue's list. company: of its hash.
local function place(command, queue, id, company)
  if company then
    to_suspects(queue, id)
  else
    redis.call(command, KEY.queue .. queue, id)
  end
end

-- Into the queue.
local function push(command, queue, id)
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'enqueued_at', utc())
  place(command, queue, id, redis.call('HGET', KEY.job .. id, 'company'))
end
