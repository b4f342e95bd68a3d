-- Add what a worker has measured to the counters of the pool.
--
-- ARGV incarnation  of the worker process
-- ARGV number       of this call, growing; the same when it is sent again
-- ARGV interval     ms from one of its checkpoints to the next, now
-- ARGV usual        the same while Redis is quick; both stand in the worker's record, for people
-- EACH count: name  field of the counters (see measures.py)
-- EACH count: by    what to add
--
-- Returns  'ok', or 'already' (this very call was applied before: a reply was lost)
--
-- Once per heartbeat and worker, not per request: what a killed worker had measured since its last call is lost.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time

never_refused()

local incarnation, number, interval, usual = arg(), tonumber(arg()), arg(), arg()
local record = KEY.incarnation .. incarnation
if number_of(redis.call('HGET', record, 'measured')) >= number then return 'already' end
redis.call('HSET', record, 'measured', int(number), 'interval', interval, 'usual', usual)
if redis.call('TTL', record) < 0 then redis.call('EXPIRE', record, DAY) end
for _ = 1, tonumber(arg()) do
  local name, by = arg(), arg()
  add(KEY.counters, name, by)
end
return 'ok'
