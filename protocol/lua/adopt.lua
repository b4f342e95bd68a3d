-- Make a request of a plain job whose function is a task: `Queue.enqueue(task, ...)` of a stock RQ.
--
-- ARGV incarnation  of the worker process that has claimed the plain job
-- ARGV worker       RQ worker name
-- ARGV id           job id
-- ARGV execution    the caller's execution
-- ARGV task         dotted path
-- ARGV data         RQ's envelope, compressed
-- ARGV payload      msgpack
-- ARGV max_retries  retries after the first attempt, if the job has no Retry of RQ's
-- ARGV result_ttl   s to keep it when it has finished, if the job does not say
-- ARGV failure_ttl  s to keep it when it has failed, if the job does not say
-- ARGV left_out     what of the job the request will not do, for people; '' for nothing
--
-- Returns  'ok', or 'lost' (the job was reaped, or this was done before: a reply was lost)
--
-- It goes to the front of its queue, as it has waited its turn; whoever claims it next claims a request.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/checkpoint/chunks
--- @include lib/checkpoint/history
--- @include lib/lease/detach
--- @include lib/lease/owns
--- @include lib/lease/void
--- @include lib/queue/to_front
--- @include lib/rq/worker_state

never_refused()

local incarnation, worker, id, execution, task = arg(), arg(), arg(), arg(), arg()
local data, payload, max_retries, result_ttl, failure_ttl, left_out = arg(), arg(), arg(), arg(), arg(), arg()
local name = KEY.job .. id
local job = redis.call('HMGET', name, 'execution', 'origin', 'retries_left', 'result_ttl', 'failure_ttl', 'started_at')
if not owns(id, execution, job[1], job[6]) then
  void(id, execution, incarnation, job[2] or nil)
  return 'lost'
end
local retries = job[3] or max_retries
drop_all_chunks(id)
redis.call('DEL', KEY.output .. id, KEY.checkpoint .. id, KEY.history .. id)
detach(job[2], id, execution, incarnation, worker)
redis.call('HSET', name, 'task', task, 'data', data, 'payload', payload, 'nonce', '', 'client', '', 'timeout', '-1',
  'retries_left', retries, 'max_retries', retries, 'execution', '', 'last', '', 'attempt', '0', 'epoch', '0',
  'executions', '0', 'result_ttl', job[4] or result_ttl, 'failure_ttl', job[5] or failure_ttl)
if left_out ~= '' then history(id, 'adopted', worker, execution, '0', '', left_out) end
count('submitted', job[2])
to_front(job[2], id)
show_state(worker, incarnation)
return 'ok'
