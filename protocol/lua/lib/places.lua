-- Where a request runs: the worker's name, and its device where the host may have several. Somebody may have given
-- the name, then it survives a restart; the device does in any case. Tab-separated.
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
