--- @include lib/basics/time
--- @include lib/queue/enqueued_again

-- A request ends while it waits. Its id stays in the queue's list, since removing it would be O(n). It is noted in a
-- set: the claim that finds the id drops it, and nobody counts it as waiting. aside: it waited in a set, and not in the
-- list.
local function end_waiting(queue, id, aside)
  local job = read_dates(id)
  -- If it was enqueued again while it ran, its status is that of the run's end.
  if not aside and (job.status == 'queued' or enqueued_again(job)) then
    redis.call('ZADD', KEY.ended .. queue, now_text, id)
    redis.call('EXPIRE', KEY.ended .. queue, 7 * DAY)
  end
  -- RQ's requeue empties it, as does another job that RQ saves over this one (see enqueued_again).
  if job.started_at == '' then redis.call('HDEL', KEY.job .. id, 'started_at') end
  -- As a claim does: whoever enqueues it from now on enqueues it again.
  redis.call('HSET', KEY.job .. id, 'entered', (job.enqueued_at or '') .. ' ' .. (job.created_at or ''))
end
