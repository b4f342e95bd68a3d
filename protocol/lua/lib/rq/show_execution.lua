--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time

-- Write RQ's record of an execution, unless it is there: RQ's viewers and stop commands read it. since: ms of the
-- claim. It lives for an hour, and heartbeats renew it: RQ's own clean-up judges the job only if those have stopped for
-- so long.
local function show_execution(id, execution, worker, since)
  local composite = id .. ':' .. execution
  local name = KEY.execution .. composite
  if redis.call('EXISTS', name) == 1 then return end
  redis.call('HSET', name, 'id', execution, 'job_id', id, 'created_at', seconds_of(since) or timestamp(),
    'last_heartbeat', timestamp(), 'worker_name', worker)
  redis.call('EXPIRE', name, HOUR + 60)
  redis.call('ZADD', KEY.executions .. id, int(now_s + HOUR + 60), execution)
  redis.call('EXPIRE', KEY.executions .. id, HOUR + 60)
  redis.call('SADD', KEY.worker .. worker .. ':executions', composite)
  redis.call('EXPIRE', KEY.worker .. worker .. ':executions', HOUR + 60)
end
