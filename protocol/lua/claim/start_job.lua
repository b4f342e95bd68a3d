--- @include lib/basics/dates
--- @include lib/basics/numbers
--- @include lib/basics/time

-- Write into the hash that a job runs now: what RQ's own worker writes, and the execution.
local function start_job(id, queue, execution, job, incarnation, worker)
  local name, date = KEY.job .. id, utc()
  redis.call('HSET', name, 'status', 'started', 'started_at', date, 'last_heartbeat', date, 'worker_name', worker,
    'execution', execution, 'claimed', now_text, 'holder', incarnation,
    'executions', int(number_of(job.executions) + 1))
  -- What enqueued_again() compares with. A request that was submitted and claimed once has it in `created_at`.
  if job.enqueued_at ~= job.created_at then
    redis.call('HSET', name, 'entered', (job.enqueued_at or '') .. ' ' .. job.created_at)
  elseif job.entered then
    redis.call('HDEL', name, 'entered')
  end
  if job.passed_at then redis.call('HDEL', name, 'passed_at') end
  if (job.deadline or job.queue_deadline) and redis.call('ZREM', KEY.deadlines .. queue, id) == 1 then
    redis.call('HDEL', name, 'queue_deadline')
  end
end
