-- A worker's queues stand in one text with commas between: a comma of a name is %2C there, and a percent sign %25.
local function listed(queue)
  return (string.gsub(queue, '[%%,]', { ['%'] = '%25', [','] = '%2C' }))
end

local function without_priority(queue)
  return string.match(queue, '^(.*)%-high$') or string.match(queue, '^(.*)%-low$') or queue
end

-- Whether a worker serves a queue. queues: as its heartbeat lists them, without their priorities.
local function serves(queues, queue)
  local names = ',' .. queues .. ','
  return string.find(names, ',' .. listed(queue) .. ',', 1, true)
    or string.find(names, ',' .. listed(without_priority(queue)) .. ',', 1, true)
end
