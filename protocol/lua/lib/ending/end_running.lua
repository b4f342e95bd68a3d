--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/ending/set_deadlines_back
--- @include lib/failure/bury
--- @include lib/lease/detach
--- @include lib/rq/worker_state

-- End a running request if its deadline has passed. deadline, counted_from: of its hash. Returns whether it was ended.
local function end_running(queue, id, execution, incarnation, deadline, counted_from)
  if counted_from and set_deadlines_back(id, counted_from) then
    deadline = redis.call('HGET', KEY.job .. id, 'deadline')
  end
  if not deadline or number_of(deadline, now_ms + 1) > now_ms then return false end
  local worker = redis.call('HGET', KEY.job .. id, 'worker_name') or ''
  local started = seconds_of(redis.call('HGET', KEY.job .. id, 'claimed'))
  detach(queue, id, execution, incarnation, worker)
  bury(queue, id, execution, worker, started, 'DEADLINE', 'its deadline passed while it ran', LATE)
  show_state(worker, incarnation)
  return true
end
