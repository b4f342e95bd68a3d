-- End executions that failed: a retry by policy, or a dead letter.
--
-- ARGV incarnation        of the worker process
-- ARGV worker             RQ worker name
-- ARGV base               s before the first retry
-- ARGV cap                s before a retry at most
-- ARGV max_crashes        crashes alone that make a dead letter
-- ARGV max_crashes_total  crashes in all that make one
-- ARGV max_executions     executions without progress that make one
-- EACH request: id         request id
-- EACH request: execution  the caller's execution
-- EACH request: kind       failure kind
-- EACH request: reason     one line for people
-- EACH request: exception  traceback as RQ's result stream holds it
-- EACH request: charge     '1' charges an attempt
-- EACH request: crash      '1' counts a crash; 'batch' makes a suspect and counts nothing: others took part in the step
-- EACH request: loss       '1' counts the loss of a worker
-- EACH request: retry      '1' allows another execution
--
-- Returns  per request what became of it: 'failed', 'scheduled', 'queued' or 'canceled'; 'already' (this
--          execution's end was applied before: a reply was lost); 'lost'

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/failure/decide
--- @include lib/lease/owns
--- @include lib/lease/part
--- @include lib/lease/read_run
--- @include lib/lease/refuse_end
--- @include lib/rq/worker_state

never_refused()

local incarnation, worker, base, cap = arg(), arg(), arg(), arg()
local max_crashes, max_crashes_total, max_executions = arg(), arg(), arg()
local answers = {}
local flight = redis.call('HLEN', KEY.held .. incarnation) -- before the first of them leaves
for _ = 1, tonumber(arg()) do
  local id, execution, kind, reason, exception = arg(), arg(), arg(), arg(), arg()
  local charge, crash, loss, retry = arg(), arg(), arg(), arg()
  local job = read_run(id)
  if not owns(id, execution, job.execution, job.started_at) then
    answers[#answers + 1] = refuse_end(id, execution, incarnation, job.origin, job.last)
  else
    answers[#answers + 1] = decide(job.origin, id, job, execution, incarnation, {
      kind = kind, reason = reason, exception = exception, charge = charge, crash = crash, loss = loss, retry = retry,
      flight = flight, base = tonumber(base), cap = tonumber(cap), max_crashes = tonumber(max_crashes),
      max_crashes_total = tonumber(max_crashes_total), max_executions = tonumber(max_executions),
    })
  end
end
write_parted()
write_tally()
show_state(worker, incarnation)
return answers
