--- @include lib/enqueued_again
--- @include lib/time

-- A request ends while it waits. Its entry in the queue's list stays, since taking it out would be O(n): it is noted, so that
-- the claim that meets it knows it for what it is, and nobody counts it as waiting. aside: it stood in a set instead.
local function end_waiting(queue, id, aside)
  local job = read_dates(id)
  -- One that was enqueued again while it ran has the status of that run's end.
  if not aside and (job.status == 'queued' or enqueued_again(job)) then
    redis.call('ZADD', KEY.ended .. queue, now_text, id)
    redis.call('EXPIRE', KEY.ended .. queue, 7 * DAY)
  end
  -- RQ's requeue empties it, as does another job that RQ saves over this one (see enqueued_again).
  if job.started_at == '' then redis.call('HDEL', KEY.job .. id, 'started_at') end
  -- This coming into the queue is over, as after a claim.
  redis.call('HSET', KEY.job .. id, 'entered', (job.enqueued_at or '') .. ' ' .. (job.created_at or ''))
end
