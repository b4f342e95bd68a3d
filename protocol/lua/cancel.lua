-- Cancel requests: a waiting one at once, a running one by a flag that its worker acts upon.
--
-- ARGV incarnation  of the worker that acts upon the flag; '' for everybody else
-- ARGV worker       its RQ worker name
-- ARGV reason       one line for people
-- EACH request: id         request id
-- EACH request: execution  the worker's execution; '' for everybody else
--
-- Returns  per request 'canceled' (it has ended so), 'requested' (running: its worker will stop it), 'ended'
--          (it had ended otherwise), 'unknown', or for a worker 'lost'
--
-- The id stays in its queue's list; the claim that pops it drops it. Removing it here would be O(n).

--- @include lib/arguments
--- @include lib/counters
--- @include lib/dates
--- @include lib/detach
--- @include lib/end_waiting
--- @include lib/enqueued_again
--- @include lib/forget
--- @include lib/hint
--- @include lib/history
--- @include lib/never_refused
--- @include lib/numbers
--- @include lib/owns
--- @include lib/refuse
--- @include lib/registries
--- @include lib/retention
--- @include lib/time
--- @include lib/worker_state

never_refused()

local incarnation, worker, reason = arg(), arg(), arg()
local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution = arg(), arg()
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'status', 'origin', 'client', 'failure_ttl', 'last', 'cancel', 'started_at')
  local queue = job[3] or ''
  local verdict = string.match(job[6] or '', ':(%a+)$')
  -- A verdict whose registry has lost the id was taken back: somebody requeued it, and it waits again.
  local registry = verdict == 'stopped' and 'canceled' or verdict
  local ended = (registry == 'finished' or registry == 'failed' or registry == 'canceled')
    and redis.call('ZSCORE', KEY[registry] .. queue, id)
  local again = execution == '' and job[2] and enqueued_again(read_dates(id))
  if not job[2] then
    forget(id)
    answers[#answers + 1] = 'unknown'
  elseif execution ~= '' and not owns(id, execution, job[1], job[8]) then
    void(id, execution, incarnation, queue)
    local mine = job[6] == execution .. ':canceled' or job[6] == execution .. ':stopped'
    answers[#answers + 1] = mine and 'canceled' or 'lost'
  elseif execution == '' and job[1] and job[1] ~= '' and again ~= 'new' then
    if again then end_waiting(queue, id) end -- its second run is canceled too
    -- Once: sent again, it is the same wish.
    if job[7] ~= '1' then history(id, 'cancel', '', job[1], redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', '', reason) end
    redis.call('HSET', name, 'cancel', '1')
    answers[#answers + 1] = 'requested'
  elseif execution == '' and (ended or job[2] == 'finished' or job[2] == 'failed') and not again then
    local already = verdict == 'canceled' or verdict == 'stopped'
    answers[#answers + 1] = already and 'canceled' or 'ended'
  else
    local state = job[2] == 'stopped' and 'stopped' or 'canceled'
    if execution ~= '' then detach(queue, id, execution, incarnation, worker) end
    local aside = leave_registries(queue, id)
    if execution == '' then end_waiting(queue, id, aside) end
    redis.call('HSET', name, 'status', state, 'ended_at', utc(), 'execution', '', 'last', (execution ~= '' and execution or '-') .. ':' .. state)
    redis.call('HDEL', name, 'cancel')
    redis.call('ZADD', KEY.canceled .. queue, int(now_s), id)
    drop_checkpoint(id)
    history(id, state, worker, execution, '0', '', reason)
    share_ttl(id, number_of(job[5], 7 * DAY))
    count('canceled', queue)
    hint(job[4], id, 'end')
    answers[#answers + 1] = 'canceled'
  end
end
if incarnation ~= '' then show_state(worker, incarnation) end
return answers
