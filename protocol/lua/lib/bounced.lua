--- @include lib/counters
--- @include lib/forget

-- A worker of RQ's own that was given a request puts it where none of them looks, RQ's scheduled registry, and notes it
-- (workers/envelope.py). It has waited its turn, so it goes to the front again. Returns how many entries were looked at.
local function take_bounced(queue, limit)
  local ids = redis.call('SRANDMEMBER', KEY.bounced .. queue, limit)
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', KEY.job .. id, 'created_at', 'status', 'task')
    if job[1] and job[2] == 'scheduled' and job[3] then
      -- RQ writes the status before it writes the registry: what stands only in the first is not there yet.
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
