--- @include lib/basics/counters
--- @include lib/basics/dates
--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/checkpoint/credit_progress
--- @include lib/checkpoint/history
--- @include lib/checkpoint/interrupt
--- @include lib/ending/cancel_asked
--- @include lib/ending/end_canceled
--- @include lib/ending/watch_deadline
--- @include lib/failure/backoff
--- @include lib/failure/blame
--- @include lib/failure/bury
--- @include lib/failure/push
--- @include lib/failure/suspect
--- @include lib/failure/to_retries
--- @include lib/lease/part
--- @include lib/lease/read_run
--- @include lib/queue/ring

-- Decide what follows when an execution ended without a result, for `fail` and `reap` alike: another execution now
-- or later, or a dead letter. job: of read_run(). policy: kind; reason; exception, as stored; evidence, a text or
-- nil; charge: '1' charges an attempt; crash: '1' counts a crash, 'alone' counts one only if the request was alone,
-- 'batch' (a step raised with others in it) makes a suspect and counts nothing; loss: '1' counts a lost worker;
-- retry: '1' allows another execution; flight: how many the incarnation held; base, cap (s), max_crashes,
-- max_crashes_total, max_executions; taken: '1' if its worker has not ended it itself. Parts them (write_parted()
-- and write_tally() follow). Returns 'failed', 'queued', 'scheduled' or 'canceled'.
local function decide(queue, id, job, execution, incarnation, policy)
  local worker, claimed_ms = job.worker_name or '', number_of(job.claimed, now_ms)
  local started = seconds_of(job.claimed)
  part(queue, id, execution, incarnation, worker)
  if cancel_asked(job.cancel, job.status) then
    end_canceled(queue, id, execution, worker, job.status, 'its worker ended before it could confirm', 'canceled')
    return 'canceled'
  end
  local point = read_best(id)
  local moved = credit_progress(job, point, claimed_ms)
  local left = number_of(job.retries_left)
  local verdict, delay = 'retry', 0
  local charge, batch = policy.charge, policy.crash == 'batch'
  if policy.retry ~= '1' then verdict = 'bury' end
  if batch then
    -- A step of the batch that raised is not counted as an execution. But a request that was in many of them without
    -- progress is charged: one that raises late is cleared each time before it is alone.
    change(job, 'executions', int(math.max(0, number_of(job.executions) - 1)))
    change(job, 'raised', int(number_of(job.raised) + 1))
    if tonumber(job.raised) > policy.max_crashes_total then charge = '1' end
  end
  if charge == '1' then
    change(job, 'attempt', int(number_of(job.attempt) + 1))
    if left < 1 then
      verdict = 'bury'
    else
      change(job, 'retries_left', int(left - 1))
      local all = number_of(job.max_retries, left)
      delay = backoff(id, math.max(1, all - left + 1), policy.base, policy.cap)
    end
  end
  -- A crash makes a suspect. A lost worker without evidence does so only at the second time without progress.
  local accused, alone = policy.crash == '1' or batch, policy.flight <= 1
  if policy.loss == '1' then
    local losses = number_of(job.losses) + 1
    change(job, 'losses', int(losses))
    -- A request is not to blame for the first worker that it loses: it goes on at once.
    if losses > 1 then
      accused = true
      if alone then delay = math.max(delay, backoff(id, losses - 1, policy.base, policy.cap)) end
    end
  end
  if accused and not batch then
    change(job, 'crashes_total', int(number_of(job.crashes_total) + 1))
    if tonumber(job.crashes_total) >= policy.max_crashes_total then verdict = 'bury' end
  end
  local reason = policy.reason
  -- kill -9 leaves no evidence and may come at any time: a request that was moving is not blamed for it.
  if alone and (policy.crash == '1' or policy.crash == 'alone' and not moved) then
    local crashes = number_of(job.crashes) + 1
    change(job, 'crashes', int(crashes))
    -- Only one that was alone waits. The others run on in smaller company at once: healthy ones must not wait.
    if policy.crash == '1' then delay = math.max(delay, backoff(id, crashes, policy.base, policy.cap)) end
    if crashes >= policy.max_crashes then
      verdict = 'bury'
      reason = reason .. '; this request was alone with each of ' .. int(crashes)
        .. ' workers that ended so, without progress'
    end
  end
  if number_of(job.executions) >= policy.max_executions then verdict = 'bury' end
  if verdict == 'bury' then
    write_changes(id, job)
    bury(queue, id, execution, worker, started, policy.kind, reason, policy.exception, policy.evidence)
    return 'failed'
  end
  local offset, ran = point.offset or '0', course(job.claimed, point.seq, point.at)
  change(job, 'execution', '')
  change(job, 'last', execution .. ':retried')
  interrupt(job, point, execution, worker, policy.kind, claimed_ms, policy.taken)
  tally('again:' .. queue, policy.kind)
  if BLAMED[policy.kind] then blame(job, worker, incarnation) end
  if accused then suspect(id, job, execution, worker, policy.flight, offset, policy.kind) end
  if delay == 0 then
    change(job, 'status', 'queued')
    change(job, 'enqueued_at', utc())
    write_changes(id, job)
    history(id, 'redelivered', worker, execution, offset, policy.kind, policy.reason, policy.evidence, nil, ran)
    tally('redelivered', queue)
    -- To the front: it has waited its turn already.
    place('LPUSH', queue, id, job.company)
    if job.deadline or job.queue_deadline then watch_deadline(queue, id) end
    ring(queue)
    return 'queued'
  end
  write_changes(id, job)
  history(id, 'retry', worker, execution, offset, policy.kind, policy.reason, policy.evidence, nil, ran)
  tally('retried', queue)
  to_retries(queue, id, delay)
  return 'scheduled'
end
