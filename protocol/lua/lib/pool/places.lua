-- Where a request runs: the worker's name, a tab, and its device if it has a number. A name that a person gave survives
-- a restart of the worker; the device always does.
local function where(incarnation, worker)
  local record = redis.call('HMGET', KEY.incarnation .. incarnation, 'host', 'device')
  local device = record[2] or ''
  local place = string.find(device, '%d') and (record[1] or '') .. '/' .. device or ''
  return (string.gsub(worker, '%c', ' ')) .. '\t' .. (string.gsub(place, '%c', ' '))
end

-- Whether a request failed there before; failed_on: one place a line.
local function failed_there(failed_on, place)
  local worker, device = string.match(place, '^(.*)\t(.*)$')
  for line in string.gmatch(failed_on, '[^\n]+') do
    local other, its_device = string.match(line, '^(.*)\t(.*)$')
    if (worker ~= '' and other == worker) or (device ~= '' and its_device == device) then return true end
  end
  return false
end
