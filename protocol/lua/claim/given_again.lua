--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/lease/lease
--- @include lib/lease/owns
--- @include lib/lease/void

-- What this incarnation holds and the caller does not know was given in a reply that got lost. Each keeps its
-- execution, and its lease counts from now. held: id and execution in turn. Returns rows of id, execution, queue and
-- task (nil for a plain job).
local function given_again(incarnation, held, known, lease_ms)
  local found = {}
  for i = 1, #held, 2 do
    local id, execution = held[i], held[i + 1]
    if not known[id] then
      local job = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'task', 'step_ms', 'started_at', 'timeout')
      local queue, task = job[2] or nil, job[3] or nil
      if not owns(id, execution, job[1], job[5]) then
        void(id, execution, incarnation, queue)
      else
        if task then
          redis.call('ZADD', KEY.leases .. queue, int(now_ms + lease_length(job[4], lease_ms)), id)
        else
          -- A plain job keeps the lease that it has: it is one long step.
          redis.call('ZADD', KEY.leases .. queue, 'NX', int(now_ms + plain_lease(number_of(job[6], 180))), id)
        end
        found[#found + 1] = { id, execution, queue, task }
      end
    end
  end
  return found
end
