-- Renew leases alone: during a long prefill or a load, when there is nothing to store.
--
-- ARGV incarnation  of the worker process
-- ARGV lease_ms     length of the renewed leases, but for requests that have a step timeout of their own
-- EACH request: id         request id
-- EACH request: execution  the caller's execution
--
-- Returns  per request 'ok', 'lost', 'cancel' or 'deadline', as progress does

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/refresh
--- @include lib/ending/cancel_asked
--- @include lib/ending/end_running
--- @include lib/lease/lease
--- @include lib/lease/owns
--- @include lib/lease/refuse
--- @include lib/rq/show_execution

never_refused()

local incarnation, lease_ms = arg(), tonumber(arg())
local answers = {}
-- For the sweep: how long the leases of this worker are.
if redis.call('EXISTS', KEY.incarnation .. incarnation) == 1 then
  redis.call('HSET', KEY.incarnation .. incarnation, 'lease', int(lease_ms))
end
for _ = 1, tonumber(arg()) do
  local id, execution = arg(), arg()
  local job = redis.call('HMGET', KEY.job .. id, 'execution', 'status', 'cancel', 'origin', 'deadline', 'step_ms',
    'worker_name', 'claimed', 'started_at', 'counted_from')
  if not owns(id, execution, job[1], job[9]) then
    answers[#answers + 1] = refuse(id, execution, incarnation, job[4] or nil)
  else
    redis.call('ZADD', KEY.leases .. job[4], int(now_ms + lease_length(job[6], lease_ms)), id)
    show_execution(id, execution, job[7] or '', job[8])
    -- A checkpoint does not grow stale while its request runs.
    if redis.call('HEXISTS', KEY.checkpoint .. id, 'at') == 1 then
      redis.call('HSET', KEY.checkpoint .. id, 'at', int(now_ms))
      redis.call('ZADD', KEY.checkpoints, int(now_ms), id)
      refresh(id)
    end
    if cancel_asked(job[3], job[2]) then
      answers[#answers + 1] = 'cancel'
    else
      answers[#answers + 1] = end_running(job[4], id, execution, incarnation, job[5], job[10]) and 'deadline' or 'ok'
    end
  end
end
return answers
