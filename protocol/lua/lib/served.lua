local function unlisted(text)
  return (string.gsub(text, '%%2[5C]', { ['%25'] = '%', ['%2C'] = ',' }))
end

-- The queues that a worker serves by one name (keys.served), and the name by which one of a priority may be served.
local function served(queue)
  if string.find(queue, '%-high$') or string.find(queue, '%-low$') then return { queue } end
  return { queue, queue .. '-high', queue .. '-low' }
end
