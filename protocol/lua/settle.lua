-- End the holding of a plain RQ job, in the transaction in which RQ's own code ends the job.
--
-- ARGV incarnation  of the worker process
-- ARGV queue        queue name
-- ARGV id           job id
-- ARGV execution    the caller's execution
--
-- Returns  'ok', or 'lost' (the job was reaped and may run elsewhere: that holding is not touched)
--
-- With result_ttl 0, RQ has deleted the job's hash just before; writing to it would bring it back for ever.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/lease/detach
--- @include lib/lease/runs

never_refused()

local incarnation, queue, id, execution = arg(), arg(), arg(), arg()
unhold(id, execution, incarnation)
local job = redis.call('HMGET', KEY.job .. id, 'execution', 'holder')
if job[1] == execution then
  redis.call('HSET', KEY.job .. id, 'execution', '')
elseif runs(id, job[1], job[2]) then
  return 'lost'
end
redis.call('ZREM', KEY.leases .. queue, id)
return 'ok'
