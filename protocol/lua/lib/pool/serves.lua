-- A worker's queues are stored as one text, with commas between them: in a name, a comma is %2C and a percent sign %25.
local function listed(queue)
  return (string.gsub(queue, '[%%,]', { ['%'] = '%25', [','] = '%2C' }))
end

-- gpu-high and gpu-low are served by workers for gpu.
local function without_priority(queue)
  return string.match(queue, '^(.*)%-high$') or string.match(queue, '^(.*)%-low$') or queue
end

-- Whether a worker serves a queue. queues: as its heartbeat lists them, without their priorities.
local function serves(queues, queue)
  local names = ',' .. queues .. ','
  return string.find(names, ',' .. listed(queue) .. ',', 1, true)
    or string.find(names, ',' .. listed(without_priority(queue)) .. ',', 1, true)
end
