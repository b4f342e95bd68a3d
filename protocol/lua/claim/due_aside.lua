--- @include lib/basics/time

-- Those of these queues, in their order, of which retries may be due, or suspects wait, or what workers of RQ's own
-- have taken.
local function due_aside(queues)
  local found = redis.call('ZRANGEBYSCORE', KEY.aside, '-inf', now_text, 'LIMIT', 0, 128)
  if #found == 0 then return found end
  if #found == 128 then return queues end -- perhaps all of other workers
  local due, those = {}, {}
  for _, queue in ipairs(found) do due[queue] = true end
  for _, queue in ipairs(queues) do
    if due[queue] then those[#those + 1] = queue end
  end
  return those
end
