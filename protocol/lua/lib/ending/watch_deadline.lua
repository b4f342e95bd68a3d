--- @include lib/basics/numbers
--- @include lib/queue/aside

-- From its deadline on (ms) a sweep finds this waiting request.
local function watch(queue, id, deadline)
  redis.call('ZADD', KEY.deadlines .. queue, int(deadline), id)
  note_aside(queue, '+inf')
end

-- Let a sweep find this waiting request when its deadline has passed. While it runs, its own writes end it.
local function watch_deadline(queue, id)
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  local deadline, first = number_of(due[1]), number_of(due[2])
  if first > 0 and (deadline == 0 or first < deadline) then deadline = first end
  if deadline > 0 then watch(queue, id, deadline) end
end
