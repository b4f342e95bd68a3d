--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/hint
--- @include lib/checkpoint/history
--- @include lib/ending/end_waiting
--- @include lib/ending/mark_ended
--- @include lib/rq/registries
--- @include lib/rq/results
--- @include lib/rq/retention

-- Make a request a dead letter, with all that RQ writes for a failed job, so that `rq requeue` and every viewer work.
-- execution: '' if it waits. started: its begin in seconds, nil if unknown.
local function bury(queue, id, execution, worker, started, kind, reason, exception, evidence)
  local job = redis.call('HMGET', KEY.job .. id, 'failure_ttl', 'client')
  local ttl = number_of(job[1], 7 * DAY)
  local aside = leave_registries(queue, id)
  if execution == '' then end_waiting(queue, id, aside) end
  mark_ended(id, execution, 'failed', 'error_kind', kind, 'error_reason', reason)
  redis.call('ZADD', KEY.failed .. queue, leaves_at(ttl), id)
  add_result(id, '2', worker, execution, started, 'exc_string', exception)
  local offset = redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0'
  history(id, 'failed', worker, execution, offset, kind, reason, evidence)
  share_ttl(id, ttl)
  count('failed', queue)
  count('dead:' .. queue, kind)
  if worker ~= '' and redis.call('EXISTS', KEY.worker .. worker) == 1 then
    add(KEY.worker .. worker, 'failed_job_count', 1)
  end
  hint(job[2], id, 'end')
end
