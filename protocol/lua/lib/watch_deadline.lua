--- @include lib/numbers

-- While a request waits, a sweep must find it when its deadline passes. Running, its own writes meet it.
local function watch_deadline(queue, id)
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  local deadline, first = number_of(due[1]), number_of(due[2])
  if first > 0 and (deadline == 0 or first < deadline) then deadline = first end
  if deadline > 0 then redis.call('ZADD', KEY.deadlines .. queue, int(deadline), id) end
end
