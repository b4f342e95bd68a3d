-- Hand requests back unharmed: the checkpoint stays, no attempt is charged.
--
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- ARGV reason       one line for people
-- ARGV delay        s until they may be claimed again, doubling each time; 0 puts them in front of their queue at once
-- ARGV longest      s that such a delay may be at most; 5 where a living worker has the model
-- ARGV alive_ms     a fingerprint that no worker has shown for so long is gone
-- ARGV max_executions  executions without progress that make a dead letter
-- ARGV unable       '1' if the task could not be loaded here: that counts to no limit, and nothing of it is a failure
-- ARGV exception    traceback for that dead letter, as RQ's result stream holds it
-- EACH request: id           request id, in the order in which they were claimed
-- EACH request: execution    the caller's execution
-- EACH request: fingerprint  '' or the fingerprint that the caller could not match
--
-- Returns  per request 'queued', 'scheduled', 'canceled', 'failed' (too many executions without progress),
--          'already' or 'lost'
--
-- A fingerprint is known by queue: a worker of other queues that has the model can never take the request.
-- Pushed to the front from last to first, so that they stand there in the old order. If the fingerprint of a
-- request's checkpoint is shown by no living worker, waiting would be for ever: it restarts from zero.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/checkpoint/credit_progress
--- @include lib/checkpoint/history
--- @include lib/checkpoint/interrupt
--- @include lib/checkpoint/restart
--- @include lib/ending/cancel_asked
--- @include lib/ending/end_canceled
--- @include lib/failure/backoff
--- @include lib/failure/bury
--- @include lib/failure/to_retries
--- @include lib/lease/detach
--- @include lib/lease/owns
--- @include lib/lease/read_run
--- @include lib/lease/refuse_end
--- @include lib/pool/serves
--- @include lib/queue/to_front
--- @include lib/rq/worker_state

never_refused()

local incarnation, worker, reason, delay, longest, alive_ms = arg(), arg(), arg(), arg(), arg(), arg()
local max_executions, unable, exception = arg(), arg(), arg()

-- Whether a living worker that serves a queue, by its name or as a priority of another one, has shown a fingerprint.
local function shown(queue, fingerprint, alive_ms)
  for _, name in ipairs({ queue, without_priority(queue) }) do
    local member = name .. ' ' .. fingerprint
    local seen = redis.call('ZSCORE', KEY.fingerprints, member)
    if seen and tonumber(seen) > now_ms then
      redis.call('ZADD', KEY.fingerprints, now_text, member) -- the server's clock was set back
      return true
    end
    if seen and now_ms - tonumber(seen) <= alive_ms then return true end
  end
  return false
end

local rows, answers = {}, {}
for i = 1, tonumber(arg()) do
  local id, execution, fingerprint = arg(), arg(), arg()
  rows[i] = { id, execution, fingerprint }
end
for i = #rows, 1, -1 do
  local id, execution, fingerprint = rows[i][1], rows[i][2], rows[i][3]
  local name = KEY.job .. id
  local job = read_run(id)
  local queue = job.origin or ''
  if not owns(id, execution, job.execution, job.started_at) then
    answers[i] = refuse_end(id, execution, incarnation, job.origin, job.last)
  elseif cancel_asked(job.cancel, job.status) then
    detach(queue, id, execution, incarnation, worker)
    end_canceled(queue, id, execution, worker, job.status, reason, 'canceled')
    answers[i] = 'canceled'
  else
    local point = read_best(id)
    local offset = point.offset or '0'
    local claimed, started = number_of(job.claimed, now_ms), seconds_of(job.claimed)
    credit_progress(job, point, claimed)
    write_changes(id, job)
    detach(queue, id, execution, incarnation, worker)
    local gone, executions = false, number_of(job.executions)
    local times = executions
    if fingerprint ~= '' then
      gone = not shown(queue, fingerprint, tonumber(alive_ms))
      -- It waits for a worker that lives but is busy: however often it is handed back until then, it is not failed.
      if not gone then
        redis.call('HSET', name, 'executions', int(math.max(0, executions - 1)))
        times = add(name, 'waits', 1)
      end
    end
    if unable == '1' then
      executions = math.max(0, executions - 1)
      redis.call('HSET', name, 'executions', int(executions))
    end
    if executions >= tonumber(max_executions) and (fingerprint == '' or gone) then
      local why = 'executed ' .. max_executions .. ' times without progress; last: ' .. reason
      bury(queue, id, execution, worker, started, 'UNKNOWN', why, exception)
      answers[i] = 'failed'
    else
      change(job, 'execution', '')
      change(job, 'last', execution .. ':released')
      interrupt(job, point, execution, worker, 'RELEASED', claimed)
      write_changes(id, job)
      history(id, 'released', worker, execution, offset, '', reason)
      count('released', queue)
      if gone then restart(id, 'no living worker has the model that began it', execution) end
      if tonumber(delay) > 0 and not gone then
        -- The one that can run it may be free at any moment; an idle one that cannot takes it again and again.
        local most = fingerprint ~= '' and 5 or tonumber(longest)
        to_retries(queue, id, backoff(id, math.max(1, times), tonumber(delay), math.max(most, tonumber(delay))))
        answers[i] = 'scheduled'
      else
        to_front(queue, id)
        answers[i] = 'queued'
      end
    end
  end
end
show_state(worker, incarnation)
return answers
