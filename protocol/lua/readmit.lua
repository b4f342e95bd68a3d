-- Take back requests that a worker of RQ's own was killed with: they are held by nobody, and no queue has them.
--
-- ARGV reason  one line for people
-- EACH request: id         request id
-- EACH request: execution  RQ's execution in its started registry; '' for one that stands nowhere, or in RQ's
--                          intermediate list
--
-- Returns  per request 'queued', 'held' (a worker of ours has it, or a set of ours: nothing was done), 'ended' (only
--          RQ's traces were removed), 'already' (it waits in its queue), or 'gone' (no request of ours has this id)
--
-- RQ's worker takes an id out of the queue first and writes down what it does afterwards; killed in between, or in the
-- second that it takes to hand a request back, it leaves it there. Should that worker live all the same, it pushes the
-- id once more: a claim that meets one that runs, or has ended, drops it. Sent twice, the id stands at the front
-- already. The caller takes it out of the intermediate list afterwards: no script removes from a list.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/checkpoint/history
--- @include lib/ending/is_canceled
--- @include lib/failure/verdict
--- @include lib/lease/runs
--- @include lib/queue/to_front
--- @include lib/rq/ended
--- @include lib/rq/registries

never_refused()

local reason = arg()
local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution = arg(), arg()
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'task', 'origin', 'execution', 'last', 'status', 'holder')
  local queue, answer = job[2] or '', 'queued'
  if not job[1] then
    answer = 'gone'
  elseif runs(id, job[3], job[6]) or redis.call('ZSCORE', KEY.retries .. queue, id)
    or redis.call('ZSCORE', KEY.suspects .. queue, id) then
    answer = 'held'
  end
  if answer == 'queued' then
    if execution ~= '' then
      local composite = id .. ':' .. execution
      redis.call('ZREM', KEY.wip .. queue, composite)
      redis.call('DEL', KEY.execution .. composite)
      redis.call('ZREM', KEY.executions .. id, execution)
    end
    local verdict = verdict_of(job[4])
    if ENDED[verdict] then
      if stands_ended(queue, id, verdict) then answer = 'ended' end
    elseif is_canceled(job[5]) then
      answer = 'ended'
    end
    if answer == 'queued' and redis.call('LPOS', KEY.queue .. queue, id, 'MAXLEN', 1000) then answer = 'already' end
    if answer == 'queued' then
      leave_registries(queue, id) -- RQ's clean-up may have failed it
      history(id, 'readmitted', '', '', redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', '', reason)
      to_front(queue, id)
      count('readmitted', queue)
    end
  end
  answers[#answers + 1] = answer
end
return answers
