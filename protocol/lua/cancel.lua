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

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/checkpoint/history
--- @include lib/ending/end_canceled
--- @include lib/ending/end_waiting
--- @include lib/ending/is_canceled
--- @include lib/failure/verdict
--- @include lib/lease/detach
--- @include lib/lease/owns
--- @include lib/lease/void
--- @include lib/queue/enqueued_again
--- @include lib/queue/forget
--- @include lib/rq/ended
--- @include lib/rq/worker_state

never_refused()

local incarnation, worker, reason = arg(), arg(), arg()
local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution = arg(), arg()
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'status', 'origin', 'last', 'cancel', 'started_at')
  local queue = job[3] or ''
  local verdict = verdict_of(job[4])
  local ended = stands_ended(queue, id, verdict)
  local again = execution == '' and job[2] and enqueued_again(read_dates(id))
  if not job[2] then
    forget(id)
    answers[#answers + 1] = 'unknown'
  elseif execution ~= '' and not owns(id, execution, job[1], job[6]) then
    void(id, execution, incarnation, queue)
    local mine = job[4] == execution .. ':canceled' or job[4] == execution .. ':stopped'
    answers[#answers + 1] = mine and 'canceled' or 'lost'
  elseif execution == '' and job[1] and job[1] ~= '' and again ~= 'new' then
    if again then end_waiting(queue, id) end -- its second run is canceled too
    -- Once: sent again, it is the same wish.
    if job[5] ~= '1' then
      history(id, 'cancel', '', job[1], redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', '', reason)
    end
    redis.call('HSET', name, 'cancel', '1')
    answers[#answers + 1] = 'requested'
  elseif execution == '' and (ended or job[2] == 'finished' or job[2] == 'failed') and not again then
    answers[#answers + 1] = is_canceled(verdict) and 'canceled' or 'ended'
  else
    if execution ~= '' then detach(queue, id, execution, incarnation, worker) end
    end_canceled(queue, id, execution, worker, job[2], reason)
    answers[#answers + 1] = 'canceled'
  end
end
if incarnation ~= '' then show_state(worker, incarnation) end
return answers
