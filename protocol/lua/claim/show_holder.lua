--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/rq/worker_state

-- For people, and for whoever finds the worker dead before its first heartbeat: what it runs now, and how much of it at
-- once. path: '' for a plain job, which is alone.
local function show_holder(incarnation, worker, queues_text, timeout_ms, lease_ms, path, slots, empty)
  local record = KEY.incarnation .. incarnation
  -- The first heartbeat may come later than the worker's death: the claim itself is a sign of life.
  redis.call('ZADD', KEY.beats, 'NX', int(now_ms + timeout_ms), incarnation)
  redis.call('HSET', record, 'worker', worker, 'task', path, 'slots', path == '' and '1' or slots and int(slots) or '',
    'lease', int(lease_ms))
  -- Until the first heartbeat, which knows the names that the worker was started with.
  redis.call('HSETNX', record, 'queues', queues_text)
  if empty then redis.call('HDEL', record, 'hung', 'hung_at') end -- whoever hung here before has gone
  redis.call('EXPIRE', record, DAY)
  show_state(worker, incarnation)
end
