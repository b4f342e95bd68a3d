-- A name out of a list of queues: see listed() in lib/pool/serves.
local function unlisted(text)
  return (string.gsub(text, '%%2[5C]', { ['%25'] = '%', ['%2C'] = ',' }))
end

-- The queues that a worker serves by one name: also those of its priorities (keys.served).
local function served(queue)
  if string.find(queue, '%-high$') or string.find(queue, '%-low$') then return { queue } end
  return { queue, queue .. '-high', queue .. '-low' }
end
