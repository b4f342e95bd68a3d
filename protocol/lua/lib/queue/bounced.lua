--- @include lib/basics/counters
--- @include lib/queue/forget

-- Requeue requests that workers of RQ's own took. Such a worker puts them into RQ's scheduled registry, where none of
-- its kind looks, and notes them (workers/envelope.py). They have waited their turn: they go to the front of the queue.
-- Returns how many entries were looked at.
local function take_bounced(queue, limit)
  local ids = redis.call('SRANDMEMBER', KEY.bounced .. queue, limit)
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', KEY.job .. id, 'created_at', 'status', 'task')
    if job[1] and job[2] == 'scheduled' and job[3] then
      -- RQ writes the status first: until the id stands in the registry too, that worker is not done.
      if redis.call('ZREM', KEY.scheduled .. queue, id) == 1 then
        redis.call('SREM', KEY.bounced .. queue, id)
        redis.call('HSET', KEY.job .. id, 'status', 'queued')
        redis.call('LPUSH', KEY.queue .. queue, id)
        count('bounced', queue)
      end
    elseif not job[1] or job[2] ~= 'started' then
      redis.call('SREM', KEY.bounced .. queue, id)
      forget(id)
    end
  end
  return #ids
end
