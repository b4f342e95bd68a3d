--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/checkpoint/credit_progress
--- @include lib/checkpoint/history
--- @include lib/checkpoint/interrupt
--- @include lib/ending/cancel_asked
--- @include lib/ending/end_canceled
--- @include lib/failure/backoff
--- @include lib/failure/blame
--- @include lib/failure/bury
--- @include lib/failure/suspect
--- @include lib/failure/to_retries
--- @include lib/lease/detach
--- @include lib/queue/to_front

-- Decide what follows when an execution ended without a result, for `fail` and `reap` alike: another execution now or
-- later, or a dead letter. policy: kind; reason; exception, as stored; evidence, a text or nil; charge: '1' charges an
-- attempt; crash: '1' counts a crash, 'alone' counts one only if the request was alone, 'batch' (a step raised with
-- others in it) makes a suspect and counts nothing; loss: '1' counts a lost worker; retry: '1' allows another
-- execution; flight: how many the incarnation held; base, cap (s), max_crashes, max_crashes_total, max_executions;
-- taken: '1' if its worker has not ended it itself. Detaches the execution. Returns 'failed', 'queued', 'scheduled' or
-- 'canceled'.
local function decide(queue, id, execution, incarnation, policy)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'worker_name', 'claimed', 'cancel', 'status')
  local worker, claimed_ms = job[1] or '', number_of(job[2], now_ms)
  local started = seconds_of(job[2])
  detach(queue, id, execution, incarnation, worker)
  if cancel_asked(job[3], job[4]) then
    end_canceled(queue, id, execution, worker, job[4], 'its worker ended before it could confirm', 'canceled')
    return 'canceled'
  end
  local moved = credit_progress(id, claimed_ms)
  local left = number_of(redis.call('HGET', name, 'retries_left'))
  local verdict, delay = 'retry', 0
  local charge, batch = policy.charge, policy.crash == 'batch'
  if policy.retry ~= '1' then verdict = 'bury' end
  if batch then
    -- A step of the batch that raised is not counted as an execution. But a request that was in many of them without
    -- progress is charged: one that raises late is cleared each time before it is alone.
    redis.call('HSET', name, 'executions', int(math.max(0, number_of(redis.call('HGET', name, 'executions')) - 1)))
    if add(name, 'raised', 1) > policy.max_crashes_total then charge = '1' end
  end
  if charge == '1' then
    add(name, 'attempt', 1)
    if left < 1 then
      verdict = 'bury'
    else
      add(name, 'retries_left', -1)
      local all = number_of(redis.call('HGET', name, 'max_retries'), left)
      delay = backoff(id, math.max(1, all - left + 1), policy.base, policy.cap)
    end
  end
  -- A crash makes a suspect. A lost worker without evidence does so only at the second time without progress.
  local accused, alone = policy.crash == '1' or batch, policy.flight <= 1
  if policy.loss == '1' then
    local losses = add(name, 'losses', 1)
    -- A request is not to blame for the first worker that it loses: it goes on at once.
    if losses > 1 then
      accused = true
      if alone then delay = math.max(delay, backoff(id, losses - 1, policy.base, policy.cap)) end
    end
  end
  if accused and not batch and add(name, 'crashes_total', 1) >= policy.max_crashes_total then verdict = 'bury' end
  local reason = policy.reason
  -- kill -9 leaves no evidence and may come at any time: a request that was moving is not blamed for it.
  if alone and (policy.crash == '1' or policy.crash == 'alone' and not moved) then
    local crashes = add(name, 'crashes', 1)
    -- Only one that was alone waits. The others run on in smaller company at once: healthy ones must not wait.
    if policy.crash == '1' then delay = math.max(delay, backoff(id, crashes, policy.base, policy.cap)) end
    if crashes >= policy.max_crashes then
      verdict = 'bury'
      reason = reason .. '; this request was alone with each of ' .. int(crashes)
        .. ' workers that ended so, without progress'
    end
  end
  local executions = number_of(redis.call('HGET', name, 'executions'))
  if executions >= policy.max_executions then verdict = 'bury' end
  if verdict == 'bury' then
    bury(queue, id, execution, worker, started, policy.kind, reason, policy.exception, policy.evidence)
    return 'failed'
  end
  local offset = redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0'
  redis.call('HSET', name, 'execution', '', 'last', execution .. ':retried')
  interrupt(id, execution, worker, policy.kind, claimed_ms, policy.taken)
  count('again:' .. queue, policy.kind)
  if BLAMED[policy.kind] then blame(id, worker, incarnation) end
  if accused then suspect(id, execution, worker, policy.flight, offset, policy.kind) end
  if delay == 0 then
    history(id, 'redelivered', worker, execution, offset, policy.kind, policy.reason, policy.evidence)
    count('redelivered', queue)
    to_front(queue, id)
    return 'queued'
  end
  history(id, 'retry', worker, execution, offset, policy.kind, policy.reason, policy.evidence)
  count('retried', queue)
  to_retries(queue, id, delay)
  return 'scheduled'
end
