--- @include lib/failure/verdict
--- @include lib/queue/enqueued_again
--- @include lib/queue/live_again
--- @include lib/rq/ended

-- Entries of a queue's list whose request has ended and was requeued lose the TTL of that end, or they would expire
-- waiting.
local function keep_requeued(queue, ids)
  for _, id in ipairs(ids) do
    local name = KEY.job .. id
    if redis.call('TTL', name) >= 0 then
      local v = redis.call('HMGET', name, 'task', 'last')
      local verdict = verdict_of(v[2])
      if v[1] and ENDED[verdict] and (not stands_ended(queue, id, verdict) or enqueued_again(read_dates(id))) then
        live_again(id)
      end
    end
  end
end
