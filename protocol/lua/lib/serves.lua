-- A worker's queues stand in one text with commas between: a comma of a name is %2C there, and a percent sign %25.
local function listed(queue)
  return (string.gsub(queue, '[%%,]', { ['%'] = '%25', [','] = '%2C' }))
end

local function without_priority(queue)
  return string.match(queue, '^(.*)%-high$') or string.match(queue, '^(.*)%-low$') or queue
end
