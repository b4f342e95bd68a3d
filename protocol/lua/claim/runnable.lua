--- @include claim/read_job
--- @include lib/basics/counters
--- @include lib/checkpoint/history
--- @include lib/ending/end_if_late
--- @include lib/ending/is_canceled
--- @include lib/ending/settle_canceled
--- @include lib/failure/verdict
--- @include lib/lease/detach
--- @include lib/lease/runs
--- @include lib/queue/begin_anew
--- @include lib/queue/enqueued_again
--- @include lib/queue/forget
--- @include lib/rq/ended
--- @include lib/rq/registries

-- An id that is not run leaves its queue. Its history says why, and lives no longer for that.
local function drop(id, queue, worker, reason)
  local ttl = redis.call('TTL', KEY.job .. id)
  history(id, 'dropped', worker, '', '0', '', reason)
  if ttl > 0 then redis.call('EXPIRE', KEY.history .. id, ttl) end
  count('dropped', queue)
end

-- Whether the request that this entry of the queue is for ended while it waited; what became of it stands in its
-- history. If it was deleted and its id used again, the mark is of the one before: only an end without an execution has
-- '-'.
local function ended_in_queue(id, queue, job)
  return redis.call('ZREM', KEY.ended .. queue, id) == 1 and string.sub(job.last, 1, 2) == '-:'
end

-- A plain job. RQ's status is its truth; one that we ended once may be enqueued again under the same id.
local function runnable_plain(id, queue, job, verdict)
  if verdict then
    redis.call('HDEL', KEY.job .. id, 'last')
    leave_registries(queue, id)
  end
  if not is_canceled(job.status) then return job end
  count('dropped', queue)
end

-- Whether an id that was read from a queue is to be run. Returns its job if it is; nil if it leaves the queue; nil and
-- true if it waits where it stands. took: the ids that this claim has taken. waited: a batch of ZREM, for the set in
-- which a request may have waited.
local function runnable(id, queue, worker, took, waited)
  local job = read_job(id)
  if not job.created_at then
    forget(id)
    redis.call('ZREM', KEY.ended .. queue, id)
    return count('dropped', queue)
  end
  if took[id] then return drop(id, queue, worker, 'it stood in its queue twice') end
  local runs_now = job.execution and runs(id, job.execution, job.holder)
  local verdict = verdict_of(job.last)
  local ended = ENDED[verdict]
  if ended and ended_in_queue(id, queue, job) then return count('dropped', queue) end
  local again = (job.claimed or ended or job.started_at) and enqueued_again(job)
  if ended and not stands_ended(queue, id, verdict) then again = 'same' end
  if runs_now then
    if not again then return drop(id, queue, worker, 'it runs already') end
    -- The same request once more: after the run that goes on.
    if job.task and again == 'same' then return nil, true end
    -- A new job, or a plain one: now, as RQ does. What runs is not this job's execution any more.
    detach(queue, id, job.execution, job.holder, redis.call('HGET', KEY.incarnation .. job.holder, 'worker') or '')
  end
  if again == 'new' and job.task then
    become_plain(id, queue)
    job = read_job(id)
  end
  if not job.task then return runnable_plain(id, queue, job, verdict) end
  if ended then
    if not again then
      -- It has ended, and somebody with an old copy of the job pushed it and wrote its status.
      redis.call('HSET', KEY.job .. id, 'status', verdict)
      return drop(id, queue, worker, 'it has ended, and was not enqueued again since')
    end
    begin_anew(id, queue, verdict)
    job = read_job(id)
  elseif is_canceled(job.status) then
    settle_canceled(id)
    return count('dropped', queue)
  end
  if (job.deadline or job.queue_deadline) and end_if_late(queue, id) then
    redis.call('ZREM', KEY.ended .. queue, id) -- end_if_late marked this very entry
    return nil
  end
  waited.add(KEY.retries .. queue, id)
  return job
end
