-- End waiting requests of a task that no worker of their queue can load.
--
-- ARGV queue      queue name
-- ARGV task       dotted path
-- ARGV kind       failure kind
-- ARGV reason     one line for people
-- ARGV exception  traceback for the dead letters, as RQ's result stream holds it
-- ARGV limit      entries of the queue to look at, at most 128
-- EACH worker: incarnation  of the workers that could not load it, all that were seen to serve the queue
--
-- Returns  how many were ended, as text; '-1' if a worker lives that serves the queue and is none of these, or that
--          does not say any more that it cannot load the task: then nothing is done
--
-- Who lives and what they say is asked here, at this moment: a worker that joined, or has loaded the task, may run
-- them. An entry stays in the queue's list, a page of which is looked at, another one in each half second.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/pages
--- @include lib/basics/time
--- @include lib/failure/bury
--- @include lib/failure/verdict
--- @include lib/lease/runs
--- @include lib/pool/serves
--- @include lib/queue/enqueued_again
--- @include lib/rq/ended

never_refused()

local queue, task, kind, reason, exception = arg(), arg(), arg(), arg(), arg()
local limit = math.min(tonumber(arg()), 128)
local named = {}
for _ = 1, tonumber(arg()) do
  local incarnation = arg()
  named[incarnation] = true
end

for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', KEY.beats, '(' .. now_text, '+inf')) do
  local record = redis.call('HMGET', KEY.incarnation .. incarnation, 'queues', 'ready', 'unable')
  if serves(record[1] or '', queue) and record[2] ~= 'spare' and record[2] ~= 'leaving' then
    local says = string.find('\n' .. (record[3] or ''), '\n' .. task .. '\t', 1, true)
    if not (named[incarnation] and says) then return '-1' end
  end
end

local ended = 0
local function end_those(ids)
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', KEY.job .. id, 'task', 'execution', 'holder', 'last', 'status')
    local over = ENDED[verdict_of(job[4])] or ENDED[job[5] or '']
    if job[1] == task and not over and not runs(id, job[2], job[3]) and enqueued_again(read_dates(id)) ~= 'new' then
      bury(queue, id, '', '', nil, kind, reason, exception)
      ended = ended + 1
    end
  end
end
end_those(some_of(KEY.queue .. queue, limit, 500, 'LRANGE', 'LLEN'))
end_those(some_of(KEY.suspects .. queue, 32, 500))
return int(ended)
