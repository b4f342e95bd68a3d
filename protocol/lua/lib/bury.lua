--- @include lib/counters
--- @include lib/end_waiting
--- @include lib/hint
--- @include lib/history
--- @include lib/mark_ended
--- @include lib/numbers
--- @include lib/registries
--- @include lib/results
--- @include lib/retention
--- @include lib/time

-- RQ's whole shape of a failure, so that `rq requeue` and every viewer work.
local function bury(queue, id, execution, worker, started, kind, reason, exception, evidence)
  local job = redis.call('HMGET', KEY.job .. id, 'failure_ttl', 'client')
  local ttl = number_of(job[1], 7 * DAY)
  local aside = leave_registries(queue, id)
  if execution == '' then end_waiting(queue, id, aside) end
  mark_ended(id, execution, 'failed', 'error_kind', kind, 'error_reason', reason)
  redis.call('ZADD', KEY.failed .. queue, leaves_at(ttl), id)
  add_result(id, '2', worker, execution, started, 'exc_string', exception)
  history(id, 'failed', worker, execution, redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', kind, reason, evidence)
  share_ttl(id, ttl)
  count('failed', queue)
  count('dead:' .. queue, kind)
  if worker ~= '' and redis.call('EXISTS', KEY.worker .. worker) == 1 then
    add(KEY.worker .. worker, 'failed_job_count', 1)
  end
  hint(job[2], id, 'end')
end
